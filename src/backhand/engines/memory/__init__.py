"""What a run takes in memory and time, predicted before it begins."""
