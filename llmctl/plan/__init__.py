"""What a stage will cost on a topology that is not attached: its own step compiled, and a model beside it."""
