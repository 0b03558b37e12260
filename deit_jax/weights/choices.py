"""What people choose of weights, by name, without JAX, as `--help` says it."""

HEAD_POLICIES = {
    "error": "refuse weights whose heads or number of classes differ",
    "drop": "start all heads anew",
    "cls": "keep the class head alone; a distillation token that the weights lack starts anew",
}
