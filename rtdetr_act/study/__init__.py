"""Studies: many variants of a model trained with several seeds and compared statistically.

The pipeline: `grid` expands a study file into runs, `preparation` checks them and writes each to a run folder, and
`local` (this machine) or `cluster` (Ray) starts a `worker` process for each run, which saves a `snapshot` after each
epoch; `display` shows the progress. `run_folders` reads the finished runs, `leaderboard` compares them, `report` and
`page` write the results. `search` looks for the best plan by a sequence of studies.
"""
