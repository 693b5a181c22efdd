package relay

import (
	"strings"
	"testing"

	"tailscale.com/types/key"
)

func TestParseMeshKey(t *testing.T) {
	hexKey := strings.Repeat("0123456789abcdef", 4)
	for text, want := range map[string]string{
		hexKey:                  "",
		strings.ToUpper(hexKey): "",
		"correct horse battery": "",
		"中继一二三四五六七八九十甲乙丙丁戊己庚辛": "",
		"":                         "want 64 hex digits, got 0",
		"abc":                      "want 64 hex digits, got 3",
		hexKey[:63]:                "want 64 hex digits, got 63",
		hexKey + "0":               "want 64 hex digits, got 65",
		strings.Repeat("0", 64):    "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 64, 1 of them different",
		"correct horse":            "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 13, 8 of them different",
		"passwordpasswordpassword": "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 24, 7 of them different",
		"中继中继中继中继中继中继中继中继中继中继中继中继中继中继": "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 28, 2 of them different",
	} {
		k, err := ParseMeshKey(text)
		if want == "" && (err != nil || k.IsZero()) || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	// The digits are the key, as in derper's key file.
	if k, _ := ParseMeshKey(strings.ToUpper(hexKey)); k.String() != hexKey {
		t.Error("the digits are not the key")
	}
	a, _ := ParseMeshKey("correct horse battery")
	b, _ := ParseMeshKey("correct horse battery staple")
	if a.Equal(b) {
		t.Error("two passphrases give one key")
	}
	// Nodes of other versions derive the same key.
	if want := "2940cb30f9447ec88c258a6f6dd609565cdaa10f3312ef9aa45a2bbba566e715"; a.String() != want {
		t.Errorf("the key of a passphrase is %s, want %s", a, want)
	}
}

// A token proves one key. No token proves the zero key.
func TestMeshToken(t *testing.T) {
	ours, err := ParseMeshKey("correct horse battery")
	if err != nil {
		t.Fatal(err)
	}
	other, err := ParseMeshKey("correct horse battery staple")
	if err != nil {
		t.Fatal(err)
	}
	var none key.DERPMesh
	for name, tt := range map[string]struct {
		key    key.DERPMesh
		tokens []string
		want   bool
	}{
		"the key's":      {ours, []string{meshToken(ours)}, true},
		"among others":   {ours, []string{"x", meshToken(ours)}, true},
		"another key's":  {ours, []string{meshToken(other)}, false},
		"the key itself": {ours, []string{ours.String()}, false},
		"empty":          {ours, []string{""}, false},
		"absent":         {ours, nil, false},
		"without a mesh": {none, []string{meshToken(none)}, false},
	} {
		if got := provesKey(tt.key, tt.tokens); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
	if strings.Contains(meshToken(ours), ours.String()) {
		t.Error("the token contains the key")
	}
}
