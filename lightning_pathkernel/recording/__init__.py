"""The parts of the recorder: visit weights, displacement, basis and rows of one chord."""
