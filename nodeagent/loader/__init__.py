"""The loader: a short-lived child that compiles bpf/*.c with BCC, verifies, attaches through pinned links and exits.

Run as ``python -m nodeagent.loader --cgroup C --bpf-dir D --src bpf --layouts F``; prints one JSON object. No daemon
holds LLVM. The rest of the agent needs only the pins under D and the layouts file.
"""
