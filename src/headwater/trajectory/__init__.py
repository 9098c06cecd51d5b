"""What training did: a record of it, its steps taken again, and derivatives of what it came to.

    hw.record -> folder -> Trajectory -> Replay (forward, checked) -> Sweep (backward, for all queries) -> scores

`rules` has the optimizers and their adjoints, `steps` the seam to a framework. docs/trajectory.md says what each costs.
"""
