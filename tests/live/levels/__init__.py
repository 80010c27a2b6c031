"""The campaign of the consistency levels: is every reply as fresh as its level claims, with links cut and slots moving?

`checks` says what each reply may be and does no I/O, `load` writes, reads and judges, `links` cuts replication links,
`targets` are what the load can be pointed at, `campaign` puts them around a cluster, `report` prints.
"""
