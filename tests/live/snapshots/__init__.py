"""The campaign of snapshots: whatever is read of one is one moment of the whole cluster, while everything moves.

`families` and `subjects` know what is written and what a snapshot may show of it, `checks` judges what was read of
one, `doors` are the ways to the data, `load` writes, `lives` opens, reads and closes, `faults` kills and freezes,
`campaign` puts them on a cluster, `report` prints.
"""
