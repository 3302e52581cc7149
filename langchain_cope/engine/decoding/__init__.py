"""The maths of choosing tokens: contrast, sampling, speculation and text. No model in sight."""
