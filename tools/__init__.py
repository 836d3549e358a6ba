"""Programs beside the stages: each makes or publishes something, none is needed to train."""
