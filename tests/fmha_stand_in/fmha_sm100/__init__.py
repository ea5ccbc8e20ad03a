"""Stands in for the fmha_sm100 package where there is no chip for it: its contract and its traps, in torch.

A folder above this one is put on the path by the tests that want it, so that nobody else finds it.
"""
