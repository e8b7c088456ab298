"""The only room that touches nn.Module: layers, grids, the folded forward, the evaluator, and the applied model."""
