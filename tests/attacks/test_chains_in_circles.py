"""Tried: blocks that are their own ancestors. Must: every command ends."""

from __future__ import annotations

from attacks.ground import Ground


def test_two_blocks_follow_each_other(ground: Ground) -> None:
    ground.change("UPDATE blocks SET parent = (SELECT max(name) FROM blocks) WHERE name = (SELECT min(name) FROM blocks)")
    ground.change("UPDATE blocks SET parent = (SELECT min(name) FROM blocks) WHERE name = (SELECT max(name) FROM blocks)")
    ground.use_everything()


def test_all_follow_one(ground: Ground) -> None:
    for start in (0, 256, 512):
        ground.change("UPDATE blocks SET start = ?, parent = (SELECT max(name) FROM blocks)", start)
        ground.use_everything()
        ground.put()


def test_empty_tails_follow_each_other(ground: Ground) -> None:
    ground.change("UPDATE blocks SET start = 256, whole = 0, stateful = 1, tokens = x''")
    ground.change("UPDATE blocks SET parent = (SELECT max(name) FROM blocks) WHERE name < (SELECT max(name) FROM blocks)")
    ground.change("UPDATE blocks SET parent = (SELECT min(name) FROM blocks) WHERE name = (SELECT max(name) FROM blocks)")
    ground.use_everything()
