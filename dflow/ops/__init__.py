"""Operations on tensors that know no model: the ring Z/K, straight-through estimators, lengths."""
