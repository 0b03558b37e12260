# A regular package: one of this name among installed packages would win over a folder without.
