"""What one run of `PersonalizeUser` is made of: held-out items, the job folder and the gate."""
