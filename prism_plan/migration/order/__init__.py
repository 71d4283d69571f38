"""The order of a migration's loads and drops: experts keep their replicas, GPUs their memory.

A load waits for the drop that freed its room, and a drop for the loads of copies that stay. The
greedy part (:mod:`.greedy`) loads what is called most, onto any GPU with room, and makes room by
dropping copies beside which enough others stay. Where experts are of one size, it gets stuck only
if every pending load waits for a copy that cannot be spared on a GPU that is stuck as well, as many
in as out (:mod:`.wait_for_graph`). Each connected group of such GPUs then has an Euler circuit, and
one free slot (or copy to spare) anywhere (:mod:`.free_slot`) leads around it and is restored
afterwards (:mod:`.cycles`). Where sizes differ, temporary copies are tried one by one
(:mod:`.unequal_sizes`). Only where none of this helps an expert has a copy less for a while.
"""
