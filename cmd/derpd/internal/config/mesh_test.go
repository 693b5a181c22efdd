package config

import (
	"strings"
	"testing"

	"derpd/relay"
)

func TestParseMeshNode(t *testing.T) {
	pin := strings.Repeat("ab", 32)
	for entry, want := range map[string]relay.MeshNode{
		"b.example.com":                                  {Host: "b.example.com", Port: 443},
		"B.example.com.:8443":                            {Host: "b.example.com", Port: 8443},
		"b.example.com/10.0.0.2":                         {Host: "b.example.com", Port: 443, Dial: "10.0.0.2:443"},
		"b.example.com:8443/derp-b:443":                  {Host: "b.example.com", Port: 8443, Dial: "derp-b:443"},
		"b.example.com/fd00::2":                          {Host: "b.example.com", Port: 443, Dial: "[fd00::2]:443"},
		"b.example.com/[fd00::2]:8443":                   {Host: "b.example.com", Port: 443, Dial: "[fd00::2]:8443"},
		"203.0.113.7=sha256-raw:" + pin:                  {Host: "203.0.113.7", Port: 443, CertHash: pin},
		"[2001:db8::7]=sha256-raw:" + pin:                {Host: "2001:db8::7", Port: 443, CertHash: pin},
		"2001:db8::7":                                    {Host: "2001:db8::7", Port: 443},
		"[2001:db8::7]:8443/10.0.0.2=sha256-raw:" + pin:  {Host: "2001:db8::7", Port: 8443, Dial: "10.0.0.2:8443", CertHash: pin},
		"203.0.113.7=sha256-raw:" + strings.ToUpper(pin): {Host: "203.0.113.7", Port: 443, CertHash: pin},
	} {
		if got, err := parseMeshNode(entry); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", entry, got, err, want)
		}
	}
}
