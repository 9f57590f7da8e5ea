"""Quality of the demo in numbers: `wanvideo quality`.

Portraits and voices are ones that training has not seen. Every setting makes the same clips from the same seeds.
"""
