"""Who visits which rows of a pass, and where: each file is a `headwater.rows.Runner`."""
