"""Drop-ins for torch.nn.functional."""
