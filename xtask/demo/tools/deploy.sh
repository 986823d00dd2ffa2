# Logs in to the build host.
exec ssh -F none -i "$AGENT_KEY" -o BatchMode=yes -o ConnectTimeout=5 -o LogLevel=ERROR \
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    root@203.0.113.5 deploy
