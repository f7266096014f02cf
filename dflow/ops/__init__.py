"""Operations on tensors that know no model: Z/K, straight-through estimators, normal tails, lengths."""
