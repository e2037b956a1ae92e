"""Law: all systems and ours in one table: what each stores, what it errs, what a model notices, and how quick it is.

``systems`` is the table of them: another system is an entry there. ``parts`` measures one system on one model and text, and
keeps what it found; ``report`` puts the parts together; ``__main__`` is the command ``python -m benchmarks.codecs``.
"""
