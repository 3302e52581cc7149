"""`cope-lc adapters`: the commands on what is in a store."""
