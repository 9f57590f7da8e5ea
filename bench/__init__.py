"""`wanvideo bench`: how fast this machine runs Wan, beside peers and the sum of the best primitives in the same run.

Weights are random in the published shapes, so that nothing is downloaded. A kind of measurement is a file with a row in
`cli.KINDS`.
"""
