"""Operations on tensors, independent of models: Z/K, straight-through estimators, normal tails, lengths."""
