"""The store's fault campaign: what becomes of traffic, of the record and of its file while the store fails.

`faults` are the faults, `stage` is a cluster with a proxy, its load, slots that move and eyes on the admin port,
`record` reads a store's file without the proxy, `truth` decides what the record owes to what really happened,
`campaign` and `kills` carry it out, `report` prints.
"""
