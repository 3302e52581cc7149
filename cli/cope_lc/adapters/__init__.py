"""`cope-lc adapters`: the commands on what is in a store.

`versions.py` lists users and their versions, `transfer.py` moves them in and out, `care.py` keeps
the store sound; `stored.py` and `view.py` are what they share.
"""
