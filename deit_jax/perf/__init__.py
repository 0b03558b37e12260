"""Step time, input rate, planning for TPUs that are not there."""
