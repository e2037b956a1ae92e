"""The programs that run models: transformers' caches, the block tables of serving engines, and the identity of a model."""
