"""The "no wrong read" campaign: checkable load on a proxy while the slots behind it move.

`resp` speaks to the proxy, `keys` knows what each reply may be, `workload` is the load's own process with
fifty clients, `campaign` starts cluster and proxy and alternates quiet phases with moves, `report` prints.
Nothing here imports the proxy under test; any server that speaks RESP can stand in its place.
"""
