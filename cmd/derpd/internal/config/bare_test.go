package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBare(t *testing.T) {
	for _, tt := range []struct {
		value, want string
		lines       bool
		faults      string // joined by ", "
	}{
		{value: "/data", want: "/data"},
		{value: "a b", want: "a b"},
		{value: `it's "it`, want: `it's "it`},
		{value: `'it`, want: `'it`},
		{value: `"a'`, want: `"a'`},
		{value: "“上海”中继", want: "“上海”中继"},
		{value: "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", want: "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"},
		{value: "a\nb", want: "a\nb"},
		{value: "\xff", want: "\xff"},

		{value: `"/data"`, want: "/data", faults: "is in quotes"},
		{value: `'/data'`, want: "/data", faults: "is in quotes"},
		{value: `"`, want: "", faults: "is in quotes"},
		{value: `""`, want: "", faults: "is in quotes"},
		{value: `"'a'"`, want: "a", faults: "is in quotes"},
		{value: "“a”", want: "a", faults: "is in quotes"},
		{value: "„a“", want: "a", faults: "is in quotes"},
		{value: "‘a’", want: "a", faults: "is in quotes"},
		{value: "“a\"", want: "a", faults: "is in quotes"},
		{value: "\"a”", want: "a", faults: "is in quotes"},
		{value: "「a」", want: "a", faults: "is in quotes"},
		{value: " a", want: "a", faults: "begins with a space"},
		{value: "a ", want: "a", faults: "ends with a space"},
		{value: "\ta", want: "a", faults: "begins with a tab"},
		{value: "a\t", want: "a", faults: "ends with a tab"},
		{value: "a\n", want: "a", faults: "ends with a newline"},
		{value: "a\r", want: "a", faults: "ends with a carriage return"},
		{value: "a\rb", want: "ab", faults: "contains a carriage return"},
		{value: "\ufeffa", want: "a", faults: "begins with a byte order mark"},
		{value: "a\ufeff", want: "a", faults: "ends with a byte order mark"},
		{value: "a\u200b", want: "a", faults: "ends with a zero-width space"},
		{value: "\u00a0a", want: "a", faults: "begins with a non-breaking space"},
		{value: "a\u200e", want: "a", faults: "ends with the invisible character U+200E"},
		{value: "a\u3000", want: "a", faults: "ends with the invisible character U+3000"},
		{value: "a\u2800", want: "a", faults: "ends with the invisible character U+2800"},
		{value: "a\x1b", want: "a", faults: "ends with the invisible character U+001B"},
		{value: "a\x00b", want: "ab", faults: "contains a NUL character"},
		{value: "   ", want: "", faults: "begins with a space"},
		{value: " \"a\"\r", want: "a", faults: "begins with a space, ends with a carriage return, is in quotes"},

		// Several lines.
		{lines: true, value: "\na\r\nb\n", want: "a\r\nb"},
		{lines: true, value: "a\r", want: "a", faults: "ends with a carriage return"},
		{lines: true, value: " a", want: "a", faults: "begins with a space"},
		{lines: true, value: "\n \n", want: "", faults: "begins with a space"},
	} {
		got, faults := bare(tt.value, tt.lines)
		if got != tt.want || strings.Join(faults, ", ") != tt.faults {
			t.Errorf("%q: %q, %q; want %q, %s", tt.value, got, faults, tt.want, tt.faults)
		}
	}
}

// ugly are the ways in which a value is not bare.
var ugly = []string{`"%s"`, `'%s'`, "%s ", " %s", "%s\t", "\t%s", "%s\r", "\ufeff%s", "%s\ufeff", "%s\u200b", "\u00a0%s", "“%s”"}

// Every variable refuses values that are not bare, by name and without showing
// them: in the environment, as the path of a file, and in a file.
func TestEveryVariableRefusesValuesThatAreNotBare(t *testing.T) {
	dir := t.TempDir()
	const secret = "s3cret"
	for i, form := range ugly {
		file(fmt.Sprint(i), fmt.Sprintf(form, secret)+"\n")(t, dir)
	}
	variables := readEnvironment(nil, new(problems)).variables()
	for i, form := range ugly {
		path := filepath.Join(dir, fmt.Sprint(i))
		for _, kind := range []struct{ suffix, value, want string }{
			{"", fmt.Sprintf(form, secret), "the value "},
			{"", fmt.Sprintf(form, "a\r\nb\nc"), "the value "},
			{"_FILE", fmt.Sprintf(form, path), "the value "},
			{"_FILE", path, "the content of " + path + " "},
		} {
			var environ []string
			for _, v := range variables {
				environ = append(environ, v.Name+kind.suffix+"="+kind.value)
			}
			p := new(problems)
			e := readEnvironment(environ, p)
			lines := strings.Split(fmt.Sprint(p.err(e.order)), "\n")
			for _, v := range variables {
				if kind.value == path && (form == "%s\r" || v.tag("lines") == "true" && strings.Trim(form, " \t") == "%s") {
					// The end of the last line, and blanks around the
					// lines, are no part of a value in a file.
					continue
				}
				want := v.Name + kind.suffix + ": " + kind.want
				at := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) })
				if at == -1 || strings.Contains(lines[at], secret) {
					t.Errorf("%s%s=%q: want %q, and not the value, in\n%s", v.Name, kind.suffix, kind.value, want, strings.Join(lines, "\n"))
				}
			}
		}
	}
}

// A file of keys may have Windows line ends and blanks, as before.
func TestKeyFileOfWindows(t *testing.T) {
	dir := t.TempDir()
	file("keys", "# mine\r\nnodekey:"+key64+" # laptop\r\n\r\n  nodekey:"+strings.ReplaceAll(key64, "ab", "cd")+"  \r\n \r\n")(t, dir)
	for _, name := range []string{"DERP_ALLOW_KEYS", "DERP_ALLOW_KEYS_FILE"} {
		c, err := Load(append(base(dir), name+"="+dir+"/keys"))
		if err != nil || len(c.Sources) != 1 || c.Sources[0].Target != dir+"/keys" {
			t.Errorf("%s: %+v, %v", name, c.Sources, err)
		}
	}
	if _, err := Load(append(base(dir), "DERP_ALLOW_KEYS=\nnodekey:"+key64+"\nnodekey:"+key64+"\n")); err != nil {
		t.Errorf("several lines, as a Compose file may have them: %v", err)
	}
}

// One fault is one problem: what else is wrong with the bare value is reported, and
// what is not is accepted.
func TestProblemsBesideQuotes(t *testing.T) {
	const hint = "; write it bare: `docker run --env-file` and Compose's list form keep quotes and blanks, and Windows line ends are carriage returns"
	dir := t.TempDir()
	for value, want := range map[string]string{
		`DERP_REGION_ID="901"`:             "DERP_REGION_ID: the value is in quotes" + hint,
		`DERP_REGION_ID="1"`:               "DERP_REGION_ID: the value is in quotes" + hint + "\nDERP_REGION_ID: want a number from 900 to 999 (the others are Tailscale's), got \"1\"",
		`DERP_DATA_DIR="` + dir + `"`:      "DERP_DATA_DIR: the value is in quotes" + hint,
		`DERP_REGION_CODE=" "`:             "DERP_REGION_CODE: the value is in quotes and begins with a space" + hint,
		"DERP_CERT_MODE=letsencrypt\r":     "DERP_DOMAIN: want the name that the certificate is for, since DERP_CERT_MODE is letsencrypt; got nothing\nDERP_CERT_MODE: the value ends with a carriage return" + hint,
		`DERP_MESH_WITH=""`:                "DERP_MESH_WITH: the value is in quotes" + hint,
		`DERP_TAILNET_OAUTH_CLIENT_ID='a'`: "DERP_TAILNET_OAUTH_CLIENT_ID: the value is in quotes" + hint + "\nDERP_TAILNET_OAUTH_CLIENT_SECRET: want one secret for each client ID; got 1 in DERP_TAILNET_OAUTH_CLIENT_ID and 0 here",
	} {
		if _, err := Load(append(base(dir), value)); fmt.Sprint(err) != want {
			t.Errorf("%s:\n%v\nwant\n%s", value, err, want)
		}
	}
}
