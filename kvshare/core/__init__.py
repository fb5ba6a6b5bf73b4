"""What everything rests on and nothing of ours below it: policy ids, versions, LMCache's settings, errors."""
