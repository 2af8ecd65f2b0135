"""What a run minimises beside the loss of answers: functions of the log-probabilities of a row's answers."""
