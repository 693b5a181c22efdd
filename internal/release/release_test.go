package release

import "testing"

func TestNewest(t *testing.T) {
	for name, test := range map[string]struct {
		released  []string
		evenMinor bool
		want      string
	}{
		"a patch number is skipped":  {[]string{"v1.104.0", "v1.104.2", "v1.104.4"}, true, "v1.104.4"},
		"all even digits":            {[]string{"v1.100.0", "v1.102.0", "v1.104.0", "v1.106.0", "v1.108.0", "v1.109.0"}, true, "v1.108.0"},
		"no versions":                {nil, false, ""},
		"numbers, not letters":       {[]string{"v1.104.9", "v1.104.10"}, true, "v1.104.10"},
		"any order":                  {[]string{"v1.104.1", "v1.98.9", "v1.104.0"}, true, "v1.104.1"},
		"odd minor versions":         {[]string{"v1.104.0", "v1.105.0", "v1.105.3"}, true, "v1.104.0"},
		"odd ones of another module": {[]string{"v0.24.0", "v0.25.0"}, false, "v0.25.0"},
		"pre-releases":               {[]string{"v1.104.0", "v1.106.0-pre", "v1.106.0-rc.1"}, true, "v1.104.0"},
		"not a version":              {[]string{"v1.104.0", "v1.106", "1.106.0", "v1.106.0+x", "v1.0106.0", ""}, true, "v1.104.0"},
		"pseudo-versions":            {[]string{"v1.104.0", "v1.106.1-0.20261101000000-0123456789ab"}, true, "v1.104.0"},
		"a new major version":        {[]string{"v1.104.0", "v2.0.0"}, true, "v2.0.0"},
		"no stable version":          {[]string{"v1.105.0", "v1.106.0-pre"}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Newest(test.released, test.evenMinor); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
