"""Benchmarks that others publish, asked and scored as they are scored there: what `vl2 eval --data` does.

files --samples--> questions --benchmarks: prompt--> engine --run: answers.jsonl--> metrics --results, page--> numbers
"""
