"""Run tasks of lm-evaluation-harness (extra `eval`) on artifacts."""
