"""`deit share`: a trained model as a repository of the Hugging Face hub."""
