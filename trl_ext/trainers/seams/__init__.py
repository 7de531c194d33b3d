"""The only modules that touch what TRL keeps private."""
