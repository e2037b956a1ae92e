"""What is known of the programs that run models: their caches, their block tables, and which model a cache belongs to."""
