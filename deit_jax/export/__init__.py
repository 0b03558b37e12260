"""`deit export`: a model as a program that runs without this code."""
