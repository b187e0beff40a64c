"""What a continued run finds: `damage.drop_damaged` deletes what the disk did not keep."""
