# Clones the repository the issue is about.
set -e
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
git clone --quiet http://192.0.2.10/shop.git "$target/shop"
git -C "$target/shop" log --oneline -1
