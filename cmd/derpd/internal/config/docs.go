package config

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"derpd/certs"
)

//go:generate go run ./makedocs ../../../..

// Documentation lists every variable, in the order of the documents.
type Documentation struct {
	Variables []Variable
	Providers []ProviderDocs
}

// ProviderDocs are the variables of one DNS provider.
type ProviderDocs struct {
	Name      string
	Variables []Variable
}

// Document returns the documentation of the variables. Values are the defaults.
func Document() Documentation {
	e := readEnvironment(nil, new(problems))
	d := Documentation{Variables: e.documented()}
	for _, provider := range certs.DNSProviders() {
		d.Providers = append(d.Providers, ProviderDocs{provider.Name, variablesOf(e.providers[provider.Name])})
	}
	return d
}

// WriteExample writes docker/env.example, an environment file to fill in.
func WriteExample(w io.Writer) error {
	d := Document()
	var b strings.Builder
	b.WriteString("# Copy this file to .env beside compose.yaml, or to /etc/derpd.env for systemd, and\n" +
		"# uncomment what you need.\n" +
		"# Each variable can be given as a file: NAME_FILE=/run/secrets/name.\n" +
		"# Write values without quotes, and absolute paths.\n" +
		"# Made by: derpd env --example\n")
	for _, v := range d.Variables {
		fmt.Fprintf(&b, "\n# %s\n", v.Meaning())
		if v.Computed() != "" {
			fmt.Fprintf(&b, "# default: %s\n", v.Computed())
		}
		fmt.Fprintf(&b, "#%s=%s\n", v.Name, v.Default())
	}
	for _, provider := range d.Providers {
		fmt.Fprintf(&b, "\n# --- DERP_DNS_PROVIDER=%s ---\n", provider.Name)
		for _, v := range provider.Variables {
			optional := ""
			if v.Optional() {
				optional = " (optional)"
			}
			fmt.Fprintf(&b, "# %s%s\n#%s=%s\n", v.Meaning(), optional, v.Name, v.Default())
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteEffective writes every variable with its value, without secrets, and with
// the source of the value. Of DNS providers' variables it writes those that are
// set, and those of the chosen provider. It also works for a configuration with
// problems; computed defaults are then empty.
func (c *Config) WriteEffective(w io.Writer) error {
	e := c.environment
	list := e.documented()
	for _, provider := range certs.DNSProviders() {
		for _, v := range variablesOf(e.providers[provider.Name]) {
			if e.given[v.Name] || provider.Name == e.Provider {
				list = append(list, v)
			}
		}
	}
	for _, v := range list {
		shown, source := v.Shown(), "default"
		switch {
		case e.files[v.Name] != "":
			source = "from " + e.files[v.Name]
		case e.given[v.Name]:
			source = "set"
		case slices.Contains(e.assumed, v.Name):
			source = e.platform.name
		}
		if shown == "" && v.Computed() != "" {
			source += ": " + v.Computed()
			shown = c.computed[v.Name]
		}
		if _, err := fmt.Fprintf(w, "%s=%s  # %s\n", v.Name, shown, source); err != nil {
			return err
		}
	}
	return nil
}

// computedDefaults are the values of variables whose default is not one value,
// except those that depend on a running relay.
func (c *Config) computedDefaults() map[string]string {
	values := map[string]string{
		"DERP_HTTP_PORT": strconv.Itoa(cmp.Or(PortOf(c.Listen.HTTP), -1)),
		"DERP_CERT_DIR":  c.Storage.CertDir,
		"DERP_CERT_MODE": c.Certificate.Mode,
		"DERP_NODE_NAME": c.Region.Node.Name,

		"DERP_MAX_CONNECTIONS": formatLimit(c.Limits.Connections),
		"DERP_MAX_STRANGERS":   formatLimit(c.Limits.Strangers),
		"DERP_MAX_PER_ADDRESS": formatLimit(c.Limits.PerAddress),
	}
	if c.NodeLimits.Defaults.Rate > 0 {
		values["DERP_CLIENT_BURST"] = strconv.Itoa(c.NodeLimits.Defaults.Burst)
	}
	switch c.Certificate.Mode {
	case ModeManual:
		values["DERP_CERT_FILE"], values["DERP_KEY_FILE"] = c.Certificate.Manual.CertFile, c.Certificate.Manual.KeyFile
	case ModeLetsEncrypt:
		values["DERP_ACME_CA"] = defaultAuthority
		if c.environment.Mode == modeGCP {
			values["DERP_ACME_CA"] = googleAuthority
		}
		values["DERP_ACME_CHALLENGES"] = c.environment.challenges()
	}
	return values
}
