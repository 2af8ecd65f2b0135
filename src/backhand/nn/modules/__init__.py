"""The same backward passes as autograd Functions, for any `nn.Module`."""
