package relay

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"go4.org/mem"
	"tailscale.com/types/key"
)

// Limits of a passphrase. They refuse passphrases that can be guessed over the
// network, where each guess takes a connection to a node.
const (
	leastPassphrase = 20 // characters
	leastVariety    = 8  // different characters
)

// ParseMeshKey reads a mesh key: 64 hex digits, or a passphrase. The SHA-256 of
// the passphrase becomes the key. The error does not contain s.
func ParseMeshKey(s string) (key.DERPMesh, error) {
	different := make(map[rune]bool)
	onlyHex := true
	for _, c := range s {
		different[c] = true
		onlyHex = onlyHex && strings.ContainsRune("0123456789abcdefABCDEF", c)
	}
	length := utf8.RuneCountInString(s)
	switch {
	case onlyHex && length != 64:
		// Part of a key, more likely than a passphrase.
		return key.DERPMesh{}, fmt.Errorf("want 64 hex digits, got %d", length)
	case length < leastPassphrase || len(different) < leastVariety:
		return key.DERPMesh{}, fmt.Errorf("want 64 hex digits (openssl rand -hex 32) or a passphrase of at least %d characters, %d of them different; got %d, %d of them different",
			leastPassphrase, leastVariety, length, len(different))
	case onlyHex:
		return key.ParseDERPMesh(s)
	}
	sum := sha256.Sum256([]byte("derpd mesh key\n" + s))
	return key.DERPMeshFromRaw32(mem.B(sum[:])), nil
}

// meshToken returns proof of a mesh key that does not reveal the key. The token
// may be constant: it opens one document only, and the map has the same content.
func meshToken(k key.DERPMesh) string {
	mac := hmac.New(sha256.New, []byte(k.String()))
	_, _ = mac.Write([]byte("derpd: the node tells about itself"))
	return hex.EncodeToString(mac.Sum(nil))
}

// provesKey reports whether one of the tokens is that of k. The zero key proves
// nothing: without a mesh key there is no mesh.
func provesKey(k key.DERPMesh, tokens []string) bool {
	if k.IsZero() {
		return false
	}
	want := []byte(meshToken(k))
	return slices.ContainsFunc(tokens, func(token string) bool { return hmac.Equal([]byte(token), want) })
}
