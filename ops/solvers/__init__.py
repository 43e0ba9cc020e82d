"""The mathematics of compressing one matrix, beyond rounding it: arrays in, arrays out."""
