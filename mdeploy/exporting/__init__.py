"""`mdeploy export`: looks services up, hands the pure renderers values, checks and writes what they return."""
