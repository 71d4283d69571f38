"""The order of a migration's loads and drops: every expert stays covered, every GPU within memory.

A load waits for the drop that freed its room, and a drop for the load of a copy that stays. The
greedy part (:mod:`.greedy`) loads what is called most, onto any GPU with room, and makes room by
dropping experts that have another copy. Where experts are of one size, it gets stuck only if every
pending load is the sole copy of an expert on a GPU that is stuck as well, as many in as out. Each
connected group of such GPUs then has an Euler circuit, and one free slot (or duplicate) anywhere
leads around it and is restored afterwards (:mod:`.cycles`). Where sizes differ, temporary copies
are tried one by one (:mod:`.unequal`).
"""
