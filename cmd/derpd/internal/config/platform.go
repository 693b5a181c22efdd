package config

import "slices"

// Platform is the cloud that derpd runs on.
type Platform struct {
	Name    string   // empty if none is known
	Assumed []string // variables that the platform has set

	warnings []string
}

// platform is a cloud, found by the variables that it sets. It supplies defaults
// for variables that the operator has not set.
type platform struct {
	name string

	// defaults are values of variables.
	defaults map[string]string

	// refuse reports what was set and cannot work here.
	refuse func(p *problems, e *environment)

	// warnings are for the operator.
	warnings []string
}

// detectPlatform finds the platform by the variables that it sets: env has those
// without our prefix. set has the DERP_ variables that are set. It returns nil if
// no platform is known.
func detectPlatform(env, set map[string]string) *platform {
	switch {
	case env["FLY_APP_NAME"] != "":
		return flyIO(env, set)
	case env["RAILWAY_PROJECT_ID"] != "":
		return railway(env, set)
	}
	return nil
}

// assume sets the defaults of the platform in values, where nothing is set. It
// returns the names that it has set.
func (f *platform) assume(values map[string]string) []string {
	var names []string
	for name, value := range f.defaults {
		if values[name] == "" {
			values[name] = value
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (e *environment) parsePlatform(p *problems) Platform {
	if e.platform == nil {
		return Platform{}
	}
	if e.platform.refuse != nil {
		e.platform.refuse(p, e)
	}
	return Platform{Name: e.platform.name, Assumed: e.assumed, warnings: e.platform.warnings}
}
