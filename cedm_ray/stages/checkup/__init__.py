"""What a machine or a cluster lacks, looked at before hours are spent."""
