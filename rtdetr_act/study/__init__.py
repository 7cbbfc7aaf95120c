"""Studies: many variants and seeds, compared honestly.

In the order of the work: `grid` makes rows of a study file, `prepare` checks them and writes each into a run folder,
`queue` (this machine) or `cluster` (Ray) start a process for each, which is `work`, with its state kept by `snapshot`;
`live` shows them. `records` reads the folders, `statistics` and `leaderboard` conclude, `report` and `page` write.
"""
